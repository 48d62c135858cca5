"""Step `two inputs` of `gpu_check.py`: whether every graph answers the input that it was given, and not the one before."""

from __future__ import annotations

from typing import Any

import gpu_task
from gpu_task import Answer, Task, Verdict, modes

ORDERS = ((0,), (1,), (0,), (0, 1), (1, 0), (0,), (1,))  # rows of the two inputs, batch 1, 2 and 1 again
ROUNDS = 3  # TensorRT kinds run a batch size plainly the first time, capture it the second, and replay it after that
APART = "A against B"
Arrays = dict[str, Any]  # NumPy arrays by name


def two_inputs(task: Task) -> Answer:
    """Whether two inputs that take turns on one engine, in batches of 1, 2 and 1 again, give what each gives alone on a fresh one.

    Differences count in units of the output's largest value where that is above 1: features between two graphs have no scale of their own.
    """
    from clapsep.export.gates import LIMITS

    separator, golden = gpu_task.open_bundle(task, False)
    orders = ORDERS * ROUNDS
    data: dict[str, Any] = {"limit": LIMITS["batch against single, max error"][1][separator.precision], "orders": orders, "graphs": {}}
    for graph, inputs in golden_inputs(separator, golden).items():
        alone = [run_rows(gpu_task.open_bundle(task, False)[0], graph, inputs, (row,)) for row in (0, 1)]
        data["graphs"][graph] = {APART: furthest(alone[0], alone, (1,))}
        for mode, replayed in modes(task).items():
            shared = gpu_task.open_bundle(task, replayed)[0]
            data["graphs"][graph][mode] = [furthest(run_rows(shared, graph, inputs, order), alone, order) for order in orders]
    return judge(data)


def golden_inputs(separator: Any, golden: Any) -> dict[str, Arrays]:
    """Two different rows of the inputs of every graph that the separator's choice needs."""
    import numpy as np
    from clapsep.export.golden import as_float

    graphs = separator.choice.plans
    windows = as_float(np.stack([golden.mixture, golden.hard[-1]]))
    features, condition = separator.family.features(windows)[0], {"condition": golden.condition[:2]}
    made = {
        "text_encoder": {name: value[:2] for name, value in golden.tokens.items()},
        "audio_encoder": {"log_mel": golden.log_mel[:2]},
        "separator": {**features, **condition},
        "separator_waveform": {"mixture": windows, **condition},
        "mixture_encoder": features,
        "film": condition,
    }
    if "text_encoder_short" in graphs:
        context = separator.bundle.manifest.graphs["text_encoder_short"].inputs[0].shape[1]
        made["text_encoder_short"] = {name: value[:, :context] for name, value in made["text_encoder"].items()}
    if "mask_decoder" in graphs:
        made["mask_decoder"] = {**separator.engine("mixture_encoder").run(features), **separator.engine("film").run(condition)}
    unknown = sorted(set(graphs) - set(made))
    if unknown:
        raise Verdict("failed", f"no inputs are known for the graphs {', '.join(unknown)}")
    return {graph: made[graph] for graph in graphs}


def run_rows(separator: Any, graph: str, inputs: Arrays, rows: tuple[int, ...]) -> Arrays:
    import numpy as np

    return separator.engine(graph).run({name: np.ascontiguousarray(value[list(rows)]) for name, value in inputs.items()})


def furthest(found: Arrays, alone: list[Arrays], rows: tuple[int, ...]) -> float | None:
    """The largest difference of any output from what its rows give alone, see `two_inputs`; None if something is not finite."""
    import numpy as np

    worst = 0.0
    for name, value in found.items():
        wanted = np.concatenate([alone[row][name] for row in rows])
        if not (np.isfinite(value).all() and np.isfinite(wanted).all()):
            return None
        worst = max(worst, float(np.max(np.abs(value - wanted)) / max(1.0, np.max(np.abs(wanted)))))
    return worst


def judge(data: dict[str, Any]) -> Answer:
    """A result that is not its input's own is a failure, and so are two inputs whose results cannot be told apart."""
    graphs, limit = data["graphs"], data["limit"]
    errors = [(f"{graph}, {mode}", e) for graph, found in graphs.items() for mode in found if mode != APART for e in found[mode]]
    wrong = sorted({where for where, error in errors if error is None or error > limit})
    if wrong:
        raise Verdict("failed", f"not the result of a single run: {'; '.join(wrong)}", data)
    same = [graph for graph, found in graphs.items() if found[APART] is None or found[APART] <= 2 * limit]
    if same:
        raise Verdict("failed", f"A and B give the same: {', '.join(same)}", data)
    apart = min(found[APART] for found in graphs.values())
    return f"{len(graphs)} graphs, largest error {max(error for _, error in errors):.1e}, A and B at least {apart:.2g} apart", data
