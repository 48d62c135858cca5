"""What is said of observations: which rounds count, the floor, ratios within rounds."""

import numpy as np
import peers
import peers_tables
import pytest


@pytest.fixture
def result():
    product = [1.0, 1.02, 2.0, 1.01, 1.03, 1.0, 1.01]
    return {
        "environment": {"cpu": {"model": "a processor", "flags": ["avx2"]}},
        "about": {"threads": 2},
        "operations": {"product": 100.0, "separator": 400.0},
        "seconds": {
            "product": {"float32": product, "numpy float32": [0.9 * p for p in product], "bfloat16": [0.5 * p for p in product]},
            "copy": {"64 MiB": [0.1] * 7},
            "network": {
                "PyTorch eager": [8 * p for p in product],
                "ours": [4 * p for p in product],
                "ours bf16": [2.2 * p for p in product],
            },
        },
        "snr_db": {"network": {"PyTorch eager": None, "ours": 125.04, "ours bf16": 50.0}},
    }


def test_busy_rounds_do_not_count(result, capsys):
    assert peers_tables.quiet_rounds(result) == [0, 1, 3, 4, 5, 6]
    peers_tables.show(result)
    said = capsys.readouterr().out
    assert "6 of 7 rounds were quiet" in said
    assert "NOISY" not in said
    result["seconds"]["product"]["float32"] = [1.0, *[2.0] * 6]
    peers_tables.show(result)
    assert "TOO NOISY TO QUOTE: 1 quiet rounds" in capsys.readouterr().out


def test_floors_and_ratios(result, capsys):
    floors = peers_tables.floors(result, [0])
    assert floors == {"float32": pytest.approx(3.6), "bfloat16": pytest.approx(2.0)}, "float32 by the quicker library"
    peers_tables.show(result)
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ours")
    }
    assert [cell.strip(" |") for cell in rows["ours"][3:]] == ["2.00", "1.11", "125.0"]
    assert [cell.strip(" |") for cell in rows["ours bf16"][3:]] == ["3.64", "1.10", "50.0"]


def test_every_way_of_ours_gives_the_same(demo_bundle):
    """The peers of one engine kind, run for real on the demo model."""
    from clapsep.runtime import Bundle, Separator

    bundle = Bundle.open(demo_bundle)
    x = peers.inputs_of(Separator(bundle))
    found = list(peers.ours(bundle, x, "onnxruntime", None, 1, "cpu"))
    seconds, quality = peers.measure(found, 1)
    assert set(seconds) == {"network", "wave", "queries", "text", "audio query"}
    assert all(len(times) == 1 and times[0] > 0 for row in seconds.values() for times in row.values())
    assert min(quality["wave"]["onnxruntime"], quality["text"]["onnxruntime, short"]) > 100
    assert np.isnan(quality["queries"]["onnxruntime, 8"]), "other questions are not compared"
