#!/usr/bin/env bash
# Two machines on one: two network namespaces with an address each, joined by a cable, run one job together;
# once with torchrun, once with plain `python train.py` on both. Losses must agree, and each makes one run folder.
#   two_machines.sh PYTHON FOLDER        exit code 77: cannot be done here, the reason on stdout
set -euo pipefail
python=$1 work=$2
train=$(cd "$(dirname "$0")/../.." && pwd)/train.py

[ "$(id -u)" = 0 ] || { echo "two machines need root, to make network namespaces"; exit 77; }
command -v ip > /dev/null || { echo "two machines need the command ip: apt-get install iproute2"; exit 77; }
a=ftlab-a-$$ b=ftlab-b-$$ cable=ft$$
cleanup() { ip netns del "$a" 2> /dev/null || true; ip netns del "$b" 2> /dev/null || true; }
trap cleanup EXIT
ip netns add "$a" 2> /dev/null || { echo "network namespaces are not allowed here"; exit 77; }
ip netns add "$b"
ip link add "${cable}a" netns "$a" type veth peer name "${cable}b" netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev "${cable}a"
ip -n "$b" addr add 10.77.0.2/24 dev "${cable}b"
for end in "$a ${cable}a" "$b ${cable}b"; do
    read -r machine interface <<< "$end"
    ip -n "$machine" link set lo up
    ip -n "$machine" link set "$interface" up
done

tiny=(model.dim=16 model.n_heads=2 model.n_layers=1 model.ffn_hidden_dim=32 seq_len=96 dataset.max_samples=64
    dataset.val_fraction=0 "logger=[jsonl]" checkpoint.export=false device=cpu seed=0 parallelism=fsdp
    trainer.max_steps=3 trainer.batch_size=4)
export OMP_NUM_THREADS=1 WANDB_MODE=offline

both() { # NAME COMMAND_OF_A -- COMMAND_OF_B: both at once in folder NAME; fails if one does
    local name=$1 first=() pid status=0
    shift
    while [ "$1" != -- ]; do first+=("$1"); shift; done
    shift
    mkdir -p "$work/$name"
    cd "$work/$name"
    ip netns exec "$b" "$@" > b.out 2>&1 &
    pid=$!
    ip netns exec "$a" "${first[@]}" > a.out 2>&1 || status=1
    wait "$pid" || status=1
    [ $status = 0 ] || { echo "$name failed"; cat a.out b.out; exit 1; }
}

torchrun() { # ADDRESS IS_HOST INTERFACE
    echo env GLOO_SOCKET_IFNAME="$3" "$python" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --local_addr "$1" \
        --rdzv_backend c10d --rdzv_endpoint 10.77.0.1:29400 --rdzv_conf "is_host=$2" "$train"
}
# shellcheck disable=SC2046
both torchrun $(torchrun 10.77.0.1 1 "${cable}a") "${tiny[@]}" -- $(torchrun 10.77.0.2 0 "${cable}b") "${tiny[@]}"

alone=("$python" "$train" "${tiny[@]}" parallelism.nproc_per_node=1 parallelism.nnodes=2
    parallelism.rdzv_endpoint=10.77.0.1:29400)
both self_launched "${alone[@]}" -- "${alone[@]}"

"$python" - "$work" << 'END'
import json, sys
from pathlib import Path

runs = {}
for name in ("torchrun", "self_launched"):
    folders = [path.parent for path in Path(sys.argv[1], name).rglob("run.json")]
    assert len(folders) == 1, f"{name}: {folders}"
    [hydra] = Path(sys.argv[1], name).rglob(".hydra")
    assert hydra.parent == folders[0], hydra
    assert (folders[0] / "rank1.log").is_file()
    assert json.loads((folders[0] / "run.json").read_text())["status"] == "completed"
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    runs[name] = [line["train/loss"] for line in lines if "train/loss" in line]
assert runs["torchrun"] == runs["self_launched"] and len(runs["torchrun"]) == 3, runs
print(runs)
END
