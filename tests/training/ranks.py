"""What each rank of a training runs: batches, each followed by a collective that all ranks must join."""

from wn21k_zoo.training.data import Loader, Squash, open_dataset


def run_rank(folder, store, rank, world_size, results):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    loader = Loader(
        open_dataset(folder), batch_size=2, augmentation=Squash(32), rank=rank, world_size=world_size, workers=1, seed=1
    )
    total = torch.zeros(())
    for batch in loader:
        count = torch.tensor(float(len(batch)))
        dist.all_reduce(count)
        total += count
    results.put((rank, total.item(), loader.bad_samples))
    dist.destroy_process_group()
