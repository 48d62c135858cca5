import subprocess
import sys

HEAVY = ("torch", "onnx", "onnxruntime", "polygraphy", "scipy", "librosa", "soundfile", "soxr", "tokenizers")


def test_importing_the_runtime_imports_nothing_heavy():
    """How long it takes is measured by benchmarks/footprint.py."""
    code = f"import clapsep.runtime, sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def test_separating_needs_no_heavy_package(demo_bundle):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnxscript', 'polygraphy', 'scipy', 'safetensors']))\n"
        "import numpy; from clapsep.runtime import Query, Separator\n"
        "clip = numpy.zeros(9000, 'f4') + 0.1; s = Separator(sys.argv[1])\n"
        "print(s.separate(clip, 44100, 'rain', Query(audio=[(clip, 8000)])).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, demo_bundle], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(9000,)"


def test_no_room_imports_from_the_one_above():
    from pathlib import Path

    import clapsep.runtime

    root = Path(clapsep.runtime.__file__).parents[1]
    for room in ("engines", "runtime"):
        for path in (root / room).rglob("*.py"):
            text = path.read_text()
            assert "..export" not in text, path
            assert room == "runtime" or "..runtime" not in text, path
