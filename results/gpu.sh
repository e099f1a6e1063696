#!/usr/bin/env bash
# What only a GPU can show, most wanted first: for one H100 or H200, no network.
#
#     bash results/gpu.sh FOLDER                # CIFAR-100 as folders, train/<superclass>/<class>/x.png and test/...
#     bash results/gpu.sh FOLDER kmeans runs    # only these of  runs speed repeat kmeans bench; or: long
#
# A call ends within LIMIT seconds, 570 unless given. A part that is done leaves runs/gpu/PART.txt and is not done again;
# of one that was stopped, the trainings of `runs` and `long` go on where they were, those of `speed` and `repeat` that
# had ended are kept, the rest is done anew. After each part $SAVE, or runs/gpu/logs.tgz, holds all but the networks.
# Needs torch with CUDA, torchvision, numpy and tqdm. To try it without a GPU:
#     DEVICE=cpu MORE="--arch tiny --stem 3x3s2" TREE=4000x16x60-20-10 bash results/gpu.sh FOLDER speed repeat
set -u
DATA=$(realpath "${1:?give the folder of CIFAR-100}")
export DATA DEVICE=${DEVICE:-cuda} MORE=${MORE:-} TREE=${TREE:-1281167x128x30000-10000-1000}
shift
cd "$(dirname "$0")/.."
mkdir -p results/gpu runs/gpu

part() {  # NAME COMMAND...
    local name=$1 left=$((${LIMIT:-570} - SECONDS))
    shift
    [ -e "runs/gpu/$name.txt" ] && return
    [ $left -ge 90 ] || { echo "$name: not begun, as $left s are left: call this again"; return; }
    echo "== $name, $(date +%T)"
    timeout -k 20 -s TERM $((left - 30)) "$@" > "runs/gpu/$name.out" 2>&1
    local code=$?
    tail -n 8 "runs/gpu/$name.out"
    [ $code = 0 ] && cp "runs/gpu/$name.out" "runs/gpu/$name.txt" \
        || echo "$name ended with code $code: call this again, or read runs/gpu/$name.out"
    tar czf "${SAVE:-runs/gpu/logs.tgz}" --exclude='*.pt' --exclude='*.tgz' results/gpu runs/gpu
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
print("pictures a second in epochs 1 to 6; peak memory, GiB; seconds of the steps of 200 epochs at the last "
      "epoch's speed, without tree, checkpoints and kNN")
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
runs() {  # CIFAR-100, ResNet-18, 100 epochs: two at once, as one uses half of the card
    part runs python results/reproduce.py --jobs 2 --only 'gpu/hirl_moco-epochs-100*' --cifar100 "$DATA"
    part run-hcsc python results/reproduce.py --only 'gpu/hcsc-epochs-100*' --cifar100 "$DATA"
}
long() {  # 200 epochs, some ten minutes each; several calls
    part long python results/reproduce.py --jobs 2 --only 'gpu/*' --cifar100 "$DATA"
}
repeat() { part repeat bash -c compare_twins; }
bench() {  # the losses at the releases' scale
    part losses python bench/losses.py --device "$DEVICE"
    part hcsc python bench/hcsc.py --device "$DEVICE"
}

export -f train compare_speed compare_twins
[ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,memory.total --format=csv,noheader > runs/gpu/machine.txt
for step in ${*:-runs speed repeat kmeans bench}; do $step; done
