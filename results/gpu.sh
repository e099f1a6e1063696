#!/usr/bin/env bash
# What only a GPU can show, most wanted first: for one H100 or H200, no network.
#
#     bash results/gpu.sh FOLDER                # CIFAR-100 as folders, train/<superclass>/<class>/x.png and test/...
#     bash results/gpu.sh FOLDER kmeans runs    # only these of the steps  kmeans speed runs repeat bench
#
# Each part is stopped after ten minutes and writes results/gpu/PART.txt when it is done; then it is not done again, and
# one that was stopped goes on where it was. Needs torch with CUDA, torchvision, numpy and tqdm. To try it without a GPU:
#     DEVICE=cpu MORE="--arch tiny --stem 3x3s2" TREE=4000x16x60-20-10 bash results/gpu.sh FOLDER speed repeat
set -u
cd "$(dirname "$0")/.."
export DATA=${1:?give the folder of CIFAR-100} DEVICE=${DEVICE:-cuda} MORE=${MORE:-} TREE=${TREE:-1281167x128x30000-10000-1000}
shift
mkdir -p results/gpu runs/gpu

part() {  # NAME COMMAND...
    local name=$1
    shift
    [ -e "results/gpu/$name.txt" ] && return
    echo "== $name, $(date +%T)"
    if timeout -s TERM 570 "$@" > "runs/gpu/$name.out" 2>&1; then
        cp "runs/gpu/$name.out" "results/gpu/$name.txt"
    else
        echo "$name ended with code $?: call this again, or read runs/gpu/$name.out"
    fi
    tail -n 8 "runs/gpu/$name.out"
}

train() {  # OUT ARGUMENTS...: a short run of HIRL-MoCo, anew unless it is there
    local out=runs/gpu/$1
    shift
    [ -e "$out/backbone.pt" ] && return
    rm -rf "$out"
    python hirl_moco.py --data "$DATA" --device "$DEVICE" --amp --out "$out" $MORE "$@" > "$out.out" 2>&1
}

compare_speed() {  # with and without --compile; the last four epochs have the hierarchy
    train plain --epochs 6 --warmup-epochs 2 --eval-every 6 && train compiled --epochs 6 --warmup-epochs 2 \
        --eval-every 6 $([ "$DEVICE" = cpu ] || echo --compile) && python - <<'END'
import json
print("pictures a second in epochs 1 to 6; peak memory, GiB; seconds of training for 200 epochs at the last epoch's speed")
for name in ("plain", "compiled"):
    rows = [json.loads(line) for line in open(f"runs/gpu/{name}/log.jsonl")][1:]
    pictures = json.load(open(f"runs/gpu/{name}/config.json"))["derived"]["pictures"]
    speeds = [row["images_per_s"] for row in rows]
    print(f"{name:10}", *(f"{speed:9.0f}" for speed in speeds), f"{rows[-1]['peak_memory_gib']:9.2f}",
          f"{200 * pictures / speeds[-1]:9.0f}")
END
}

compare_twins() {  # two runs of two epochs, the second with the hierarchy: equal to the last bit?
    train twin-1 --epochs 2 --warmup-epochs 1 && train twin-2 --epochs 2 --warmup-epochs 1 && python - <<'END'
import json, torch
for i in (1, 2):
    rows = [json.loads(line) for line in open(f"runs/gpu/twin-{i}/log.jsonl")]
    print(f"twin {i}", *(f"{name} {row[name]!r}" for row in rows[1:] for name in ("moco", "path") if name in row))
a, b = (torch.load(f"runs/gpu/twin-{i}/backbone.pt", map_location="cpu") for i in (1, 2))
print("tensors of the backbone that differ:", sum(not torch.equal(a[name], b[name]) for name in a), "of", len(a))
END
}

kmeans() {  # ImageNet's 1.28 million rows: exact pass, level 0, and the tree 30000-10000-1000 (at most 1.5 s)
    part kmeans python bench/kmeans.py --device "$DEVICE" --figures 4 --sizes "$TREE"
}
speed() {  # a run with and without --compile; where a step's time goes, and the rest of an epoch's
    part speed bash -c compare_speed
    part step python bench/gpu_step.py --data "$DATA" --kernels $([ "$DEVICE" != cpu ] || echo --variants run fixed) \
        --arguments --device "$DEVICE" --preset cifar --amp $MORE
}
runs() {  # CIFAR-100, ResNet-18, 200 epochs: two at once, as one uses half of the card; a second call ends them
    part runs python results/reproduce.py --jobs 2 --only 'gpu/hirl_moco*' --cifar100 "$DATA"
    part run-hcsc python results/reproduce.py --only 'gpu/hcsc-0' --cifar100 "$DATA"
}
repeat() { part repeat bash -c compare_twins; }
bench() {  # the step on the real pipeline; the losses at the releases' scale
    part pipeline python bench/pipeline.py --data "$DATA" --arch resnet18 --stem 3x3 --batch-size 512 --device "$DEVICE"
    part losses python bench/losses.py --device "$DEVICE"
    part hcsc python bench/hcsc.py --device "$DEVICE"
}

export -f train compare_speed compare_twins
[ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,memory.total --format=csv,noheader > results/gpu/machine.txt
for step in ${*:-kmeans speed runs repeat bench}; do $step; done
