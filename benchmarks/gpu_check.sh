#!/usr/bin/env bash
# One check of everything that only a machine with an NVIDIA GPU can show, in one command:
#
#   bash benchmarks/gpu_check.sh [--bundle DIR.clapsep]... [--checkpoints CLAP CLAPSEP] [--json FILE] [--seconds S]
#   python benchmarks/gpu_tables.py FILE             (what was measured, side by side, as Markdown)
#
# It runs the doctor and measures the machine's ceilings: products in float16 and float32 (TF32 off), copies on the device and from and
# to the host. For every bundle it counts the network's operations; then, for every engine kind that is installed, it compiles plans,
# verifies against the golden data, runs two inputs in turn through every graph with and without CUDA graphs, and measures, copies
# included: batches of the waveform graph (1, 2, 4 and so on up to the bundle's largest; to 4 on the CPU) with their shares of the
# ceilings, one window from wave to wave by the routes waveform and split, 1 to 8 queries on it, a text and an audio query. PyTorch runs
# the official way of computing beside it, at batch 1 and 32: eager in float32, torch.compile, autocast to float16, the same in a CUDA
# graph; of the demo model, or of the full-size one whose files --checkpoints names. Last come the engines on the CPU.
#
# It prints one line for each step and writes raw observations as JSON (default build/gpu_check.json) after every step, so that a
# machine that goes away in between leaves what it has done. A step that cannot be done is skipped and says why; a step that crashes
# or hangs is one failed line. Exit code 0: nothing failed. 1: something did. 2: wrong usage. Bundles are copied, never changed. What the
# full-size model is meant to reach on an H200 (3 ms from wave to wave; at batch 32 40 % of the float16 products) is in the lines of
# `latency`, and no failure where it is missed.
#
# Without --bundle it builds the demo bundle in fp32 and fp16 for batches up to 64, for which torch, onnx, onnxscript and safetensors
# must be there. Bundles that are given run with the largest batch that they were built for.
# PYTHON is the interpreter, by default .venv/bin/python, else python3; 3.11 or newer. Nothing is installed and nothing fetched.
#
# A machine without a package index: carry wheels that were made for its Python, and unpack them into a folder on PYTHONPATH.
#
#   elsewhere  pip download --no-deps --only-binary=:all: --implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 \
#                  --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
#                  --platform manylinux2014_x86_64 -d wheels NAME...
#              pip wheel --no-deps -w wheels tensorrt_rtx tensorrt_rtx_cu13      (published as sources; any Python)
#   there      python3 -m pip install --no-index --no-deps --no-compile --target site wheels/*.whl
#              PYTHONPATH=$PWD/site bash benchmarks/gpu_check.sh --json out.json
#
#   always             numpy
#   doctor             click
#   ceilings           torch; without it batches have no shares of the ceilings
#   operations         onnx ml_dtypes protobuf, to the same end
#   verify, latency    tokenizers
#   pytorch            torch safetensors onnx onnx-ir ml_dtypes protobuf; for torch.compile also triton, which most builds of PyTorch
#                      bring, and a C compiler
#   any GPU engine     cuda-bindings cuda-pathfinder (by which the driver and the GPU are found)
#   onnxruntime        onnxruntime-gpu flatbuffers packaging protobuf (256 MB; CUDA and cuDNN come with most builds of PyTorch). Never
#                      beside onnxruntime, whose files it overwrites; it is the control on the CPU too
#   tensorrt-rtx       polygraphy tensorrt_rtx_cu13_libs tensorrt_rtx_cu13_bindings, and the two above (95 MB)
#   tensorrt           polygraphy tensorrt_cu13_libs tensorrt_cu13_bindings tensorrt_cu13 tensorrt, from NVIDIA's own index alone: what
#                      other indexes have under the last two names is an empty or an old package
#   openvino           openvino (59 MB), a control on the CPU
#   the demo bundle    onnx onnx-ir onnxscript ml_dtypes protobuf safetensors tokenizers torch; or build it elsewhere and give it with
#                      --bundle
#   not needed         soundfile soxr (audio files and other sample rates)
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python does not run, or is older than 3.11; set PYTHON to a newer one" >&2
    exit 2
fi

# The repository root is the import package. Where this very checkout is not what `import clapsep` finds, a link gives it that name.
links=""
is_this='import os, sys, clapsep; sys.exit(not os.path.samefile(clapsep.__file__, sys.argv[1]))'
if ! "$python" -P -c "$is_this" "$root/__init__.py" 2>/dev/null; then
    links=$(mktemp -d) || exit 2
    ln -s "$root" "$links/clapsep"
    export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
fi

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that spin take the cores from those that work
"$python" "$root/benchmarks/gpu_check.py" "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' INT TERM HUP
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # a signal ends the first wait early
[ -z "$links" ] || rm -rf "$links"
exit "$code"
