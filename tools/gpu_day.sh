#!/usr/bin/env bash
# Checks an installation on a GPU and measures what waits for one, the most important part first.
#
#   tools/gpu_day.sh            all parts that have not succeeded yet
#   tools/gpu_day.sh PART...    these parts, whether they succeeded or not
#   tools/gpu_day.sh list       the parts and what has become of them
#   tools/gpu_day.sh pack       wheels for a machine without a network, into .whl/ (git ignores it)
#
# A part is stopped after 9 minutes. Its result goes to docs/results/gpu/PART.json, its output to
# out/gpu_day/PART.log. DRY=1 prints the commands and runs nothing. PYTHON names the interpreter.
# MODEL names the folder of a real model, which the last part then trains. For pack: CUDA lists the
# versions whose bitsandbytes library is kept (CUDA="128 130"), PY the Python there.
set -euo pipefail
cd "$(dirname "$0")/.."

LIMIT=540
PARTS=(install tests captures nulls row5 row6 row7 train row9 fused model)
RESULTS=docs/results/gpu
LOGS=out/gpu_day
SHAPE=out/gpu_day/shape-1.5b
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
MODEL=${MODEL:-}

# Standard output of `command_of PART` is the bash command of the part.
command_of() {
    local bench="$PYTHON -m tools.bench --quant=nf4 --lora_r=32"
    local lean="--gradient_checkpointing=True --prompt_tokens=1024 --new_tokens=3072 --lengths=equal"
    local recipe="--quant=nf4 --train_data=tiny --eval_data=tiny --prompt=none --eval_every=0"
    local gpu="$PYTHON -m pytest -m gpu -s tests/test_gpu.py"
    case $1 in
    install) echo "$PYTHON -m pip install --no-index --no-deps .whl/*.whl" ;;
    tests) echo "$gpu -k 'not captured and not lr_0'" ;;
    captures) echo "$gpu -k captured" ;;
    nulls) echo "$gpu -k lr_0" ;;
    row5)
        echo "$bench --arch=qwen2.5-1.5b --prompts=8 --group=8 --prompt_tokens=256 --min_new=64" \
            "--new_tokens=1024 --rollout_rows=64 --peer=hf --repeats=1"
        ;;
    row6)
        echo "$bench --arch=qwen2.5-1.5b --prompts=8 --group=8 --prompt_tokens=256" \
            "--new_tokens=1024 --lengths=equal --rollout_rows=64 --repeats=1"
        ;;
    row7) # and 8: the card is capped to 8 GB
        echo "$bench --arch=qwen2.5-1.5b $lean --rollout_weights=freed --prompts=2 --group=12" \
            "--rollout_rows=24 --micro_batch_tokens=4096 --repeats=1 --extrapolate=64x16" \
            "--memory_fraction=\$($PYTHON -c \"\$SHARE_CODE\")"
        ;;
    row9)
        echo "$bench --arch=qwen2.5-7b $lean --rollout_weights=adapter --prompts=1 --group=8" \
            "--rollout_rows=8 --micro_batch_tokens=4096 --repeats=1"
        ;;
    train) # goes on from its last checkpoint
        echo "$PYTHON -c \"\$SHAPE_CODE\" $SHAPE && resume=False &&" \
            "if [[ -f $LOGS/train/state.safetensors ]]; then resume=True; fi &&" \
            "$PYTHON train.py config/random_reward.py config/model/qwen2.5_math_1.5b.py" \
            "--model=$SHAPE $recipe --steps=20 --save_every=2 --out_dir=$LOGS/train" \
            "--resume=\$resume"
        ;;
    fused) echo "$PYTHON -c \"\$FUSED_CODE\"" ;;
    model)
        echo "$PYTHON train.py config/python_reward.py" \
            "config/model/qwen2.5_math_1.5b.py --model='$MODEL' $recipe --steps=10" \
            "--save_every=0 --out_dir=$LOGS/model-\$(date +%s)"
        ;;
    *) return 1 ;;
    esac
}

# The share of the card that 8 GB are.
export SHARE_CODE='
import torch
print(min(1.0, 8e9 / torch.cuda.get_device_properties(0).total_memory))
'

# Random weights of the 1.5B shape with the tiny world's tokenizer.
export SHAPE_CODE='
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from tasks import tiny
from tools.parts.workload import model_config
folder = Path(sys.argv[1])
if not (folder / "tokenizer.json").is_file():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(model_config("qwen2.5-1.5b"), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
'

# bitsandbytes own 4-bit product against dequantising the weight and multiplying in bf16.
export FUSED_CODE='
import json
import torch
import bitsandbytes.functional as B
from bitsandbytes import matmul_4bit
def ms(f):
    for _ in range(5): f()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
    begin.record()
    for _ in range(50): f()
    end.record(); torch.cuda.synchronize()
    return begin.elapsed_time(end) / 50
out = {}
w = torch.randn(18944, 3584, device="cuda", dtype=torch.bfloat16)
q, state = B.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
for n in (1, 8, 32, 128):
    x = torch.randn(n, 3584, device="cuda", dtype=torch.bfloat16)
    out[f"rows_{n}_bitsandbytes_ms"] = ms(lambda: matmul_4bit(x, q.t(), quant_state=state))
    out[f"rows_{n}_dequantised_ms"] = ms(lambda: x @ B.dequantize_4bit(q, state).t())
    out[f"rows_{n}_bf16_ms"] = ms(lambda: x @ w.t())
print(json.dumps(out))
'

# What a part ended with, as JSON: figures are the last line of its output that is a JSON object.
RECORD_CODE='
import json, subprocess, sys
part, rc, seconds, log, file, command = sys.argv[1:]
figures = None
for line in open(log, errors="replace"):
    if line.startswith("{"):
        try: figures = json.loads(line)
        except ValueError: pass
try:
    import torch
    device, version = torch.cuda.get_device_name(), torch.__version__
except Exception as error:
    device, version = f"none ({str(error).splitlines()[0]})", None
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
tail = open(log, errors="replace").read().splitlines()[-5:]
result = dict(part=part, ok=rc == "0" and bool(version), exit_status=int(rc), seconds=int(seconds), device=device,
              torch=version, commit=commit, command=command, figures=figures, tail=tail)
json.dump(result, open(file, "w"), indent=1)
'

succeeded() { [[ -f $RESULTS/$1.json ]] && grep -q '"ok": true' "$RESULTS/$1.json"; }

# Two parts need something that is not always there.
applies() {
    case $1 in
    install) compgen -G '.whl/*.whl' >/dev/null ;;
    model) [[ -n $MODEL ]] ;;
    esac
}

run_part() {
    local part=$1 command status=0 start=$SECONDS
    command=$(command_of "$part") || {
        echo "no part '$part': tools/gpu_day.sh list" >&2
        exit 2
    }
    echo "== $part: $command"
    [[ -z ${DRY:-} ]] || return 0
    mkdir -p "$RESULTS" "$LOGS"
    timeout "$LIMIT" bash -c "$command" >"$LOGS/$part.log" 2>&1 || status=$?
    "$PYTHON" -c "$RECORD_CODE" "$part" "$status" "$((SECONDS - start))" "$LOGS/$part.log" \
        "$RESULTS/$part.json" "$command"
    tail -n 3 "$LOGS/$part.log"
    echo "== $part: exit status $status after $((SECONDS - start)) s"
}

# Wheels without their needs, which the machine has; of bitsandbytes the named CUDA versions alone.
pack() {
    local names=() name
    for name in bitsandbytes math-verify latex2sympy2_extended antlr4-python3-runtime; do
        names+=("$(grep -i "^$name==" requirements.txt)")
    done
    local command=("$PYTHON" -m pip download --no-deps --only-binary=:all: -d .whl
        --python-version "${PY:-3.12}" --platform manylinux_2_24_x86_64 --platform any
        "${names[@]}")
    echo "${command[*]}"
    [[ -z ${DRY:-} ]] || return 0
    mkdir -p .whl
    "${command[@]}"
    # shellcheck disable=SC2086  # versions are words
    "$PYTHON" - ${CUDA:-128 130} <<'CODE'
import pathlib, re, sys, zipfile
for wheel in pathlib.Path(".whl").glob("bitsandbytes-*.whl"):
    gone = lambda name: (m := re.search(r"libbitsandbytes_(cuda|rocm|xpu)(\d*)[^/]*\.so$", name)) and (
        m[1] != "cuda" or m[2] not in sys.argv[1:])
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if gone(item.filename):
                continue
            data = old.read(item)
            if item.filename.endswith("/RECORD"):
                lines = data.decode().splitlines()
                data = "\n".join(x for x in lines if not gone(x.split(",")[0])) + "\n"
            new.writestr(item, data)
    slim.replace(wheel)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.0f} MB")
CODE
}

case ${1:-} in
pack) pack ;;
list)
    for part in "${PARTS[@]}"; do
        state="not run"
        if succeeded "$part"; then
            state="done"
        elif [[ -f $RESULTS/$part.json ]]; then
            state="failed"
        fi
        echo "$part: $state"
    done
    ;;
"")
    for part in "${PARTS[@]}"; do
        if applies "$part" && ! succeeded "$part"; then run_part "$part"; fi
    done
    ;;
*)
    for part in "$@"; do run_part "$part"; done
    ;;
esac
