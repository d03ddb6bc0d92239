"""Small archives in every layout in which ImageNet-21K is distributed, with generated images."""

import gzip
import io
import tarfile

import numpy as np
from PIL import Image

WNIDS = ("n02123045", "n02084071", "n07920052")  # tabby, dog, espresso: in fall11, winter21
OUTSIDE = "n04399382"  # a noun synset in neither


def jpeg(seed, width=48, height=40, **options):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(options.pop("mode", "RGB")).save(file, options.pop("format", "JPEG"), **options)
    return file.getvalue()


def make_classes(images=12):
    """{wnid: {name: bytes}}; sizes below and above 32 pixels."""
    classes = {}
    for number, wnid in enumerate((*WNIDS, OUTSIDE)):
        classes[wnid] = {
            f"{wnid}_{index}.JPEG": jpeg(100 * number + index, 20 + 6 * (index % 5), 24 + 4 * (index % 3))
            for index in range(images)
        }
    classes[WNIDS[2]] = dict(list(classes[WNIDS[2]].items())[: images // 2])
    return classes


def tar_bytes(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def nested_tar(classes):
    return tar_bytes({f"{wnid}.tar": tar_bytes(files) for wnid, files in classes.items()})


def flat_files(classes, folder=""):
    return {f"{folder}{wnid}/{name}": data for wnid, files in classes.items() for name, data in files.items()}


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def split_files(classes, validation):
    """Laid out like the processed ImageNet-21K-P of image-net.org."""
    files = {}
    for wnid, images in classes.items():
        for rank, name in enumerate(sorted(images)):
            part = "imagenet21k_val" if rank < validation else "imagenet21k_train"
            files[f"imagenet21k_resized/{part}/{wnid}/{name}"] = images[name]
    return dict(sorted(files.items()))


LAYOUTS = {
    "nested.tar": lambda path, classes: path.write_bytes(nested_tar(classes)),
    "nested.tar.gz": lambda path, classes: path.write_bytes(gzip.compress(nested_tar(classes))),
    "flat.tar": lambda path, classes: path.write_bytes(tar_bytes(flat_files(classes, "./"))),
    "flat.tar.gz": lambda path, classes: path.write_bytes(gzip.compress(tar_bytes(flat_files(classes, "all/")))),
    "tars": lambda path, classes: write_folder(path, {f"{w}.tar": tar_bytes(files) for w, files in classes.items()}),
    "folders": lambda path, classes: write_folder(path, flat_files(classes)),
}


def write_layout(name, path, classes):
    LAYOUTS[name](path, classes)
    return path


def sparse(name, size):
    """A member of a GNU tar that consists of a hole."""
    member = tarfile.TarInfo(name)
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[386:398], block[398:410] = f"{size - 512:011o}\0".encode(), b"%011o\0" % 512
    block[483:495] = f"{size:011o}\0".encode()
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + b"x" * 512 + bytes(1024)
