#!/bin/bash
# From the archive to everything in this folder, hours on two cores; interrupted, the same command goes on.
#
#     training/results/stand_in/run.sh tiny_imagenet_whole.tar.gz FOLDER
#
# FOLDER gets shards/, runs/, logs/, and in results/ what this folder has, but for README.md and this script.
set -euo pipefail
archive=$(realpath "$1")
here=$(realpath "$(dirname "$0")")
recipes=$(realpath "$here/../../recipes/stand_in.py")
mkdir -p "$2"
cd "$2" # the recipe names its teacher runs/teacher-model
mkdir -p logs results
export OMP_NUM_THREADS=1 # of the order in which numbers are added up, so of the bits

[ -d shards ] || wn21k data prepare "$archive" shards --min-images 100 --val-per-class 20 --size 64

train() { # function and seed of each run, one after the other; long: seed 0, three times the epochs
    local each name settings
    for each in "$@"; do
        name=${each/teacher-0/teacher}
        settings=(--set "run.seed=${each##*-}")
        [ "${each##*-}" = long ] && settings=(--set run.seed=0 --set schedule.epochs=18)
        python -m wn21k_zoo.training.train --recipe "$recipes:${each%-*}" --data shards --output "runs/$name" \
            "${settings[@]}" --workers 1 2>>"logs/$name"
    done
}
train single_label-0 semantic-0 single_label-1 semantic-1 single_label-long &
train teacher-0
[ -d runs/teacher-model ] || wn21k train export runs/teacher runs/teacher-model
train distilled-0 distilled-1 semantic-long
wait $!

runs=()
for run in {single_label,semantic,distilled}-{0,1} teacher {single_label,semantic}-long; do
    mkdir -p "results/$run"
    cp "runs/$run/metrics.jsonl" "results/$run/"
    sed "s|$PWD/||g" "runs/$run/recipe.json" >"results/$run/recipe.json"
    echo "== $run" && sed "s|$PWD/||g" "logs/$run"
    [[ $run == *-long ]] || runs+=("runs/$run")
done >results/log.txt
wn21k train plot "${runs[@]}" --output results/plot.png
wn21k train export runs/distilled-1 runs/model --force
wn21k evaluate runs/model shards --plot results/reliability.png --format json >results/evaluate.json

# The first held-out image of every twentieth class.
tar --list --file shards/validation-00000.tar | grep 'jpg$' | sort --version-sort |
    awk -F_ '$1 != class { class = $1; if (number++ % 20 == 0) print }' >held-out.txt
mkdir -p held-out
tar --extract --file shards/validation-00000.tar --directory held-out --files-from held-out.txt
wn21k predict held-out --model runs/model --threshold 0.2 --format jsonl >results/predictions.jsonl
