"""What the record of detectors has besides what every record has: what routing adds, and what a lost sensor costs.

Each configuration's best checkpoints are evaluated on the whole validation split: as the data are, without images,
without LiDAR, and with each camera black in turn. Beside them stand two baselines that learned nothing of seeing: the
same network untrained, and the boxes of the training split by heart.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ....modules.detection.boxes import DETECTION_CLASSES, Detections, decode, move_boxes
from ...claims import FAILS, HOLDS, UNSURE
from ...data.splits import drives_of_splits, split_names
from ...metrics.any_class import FIGURES as ANY_FIGURES
from ...metrics.any_class import AnyClassMetric
from ...metrics.detection import evaluate_detection
from ...record import RecordOptions, Run, by_config, markdown, spread
from .data import DetectionBatch, DetectionSamples
from .experiment import DetectionExperiment, in_ego
from .routing import BINS, BOTH, DISTANCES, INPUTS

SMALL = ("bicycle", "motorcycle", "pedestrian", "traffic_cone")  # the objects that feature modulation loses first
SEEDS = 3  # of each configuration, below which there is no verdict
MATCHED, SURE = 2.0, 0.2  # metres and score of a box that counts as found, by distance
REACH = 50.0  # metres from the ego up to which objects of whatever class count
_EVERYWHERE = (-1e4, -1e4, -1e4, 1e4, 1e4, 1e4)  # metres
_CELL = 2.0  # metres: boxes of the training split within it are one place

Found = dict[str, Detections]  # sample token → its detections, in the reference ego frame


def sections(runs: Sequence[Run], folder: Path, options: RecordOptions) -> list[str]:
    """See `train.record`."""
    groups = {name: own for name, own in by_config(runs).items() if own[0].settings.data.root}
    if not groups:
        return []
    settings = next(iter(groups.values()))[0].settings
    training, validation = (
        DetectionSamples(drives, settings.data, False) for drives in drives_of_splits(settings.data)
    )
    scores = {name: [_evaluate_run(run, validation, options) for run in own] for name, own in groups.items()}
    baselines = {
        "untrained": [_score(detect(_untrained(settings), settings, validation)[BOTH], settings, validation)],
        "by heart": [_score(by_heart(training, validation), settings, validation)],
    }
    runs_by_name = {run.folder.name: own for name in groups for run, own in zip(groups[name], scores[name])}
    plain = {name: own[0] for name, own in baselines.items()}
    (folder / "detection.json").write_text(json.dumps(dict(baselines=plain, runs=runs_by_name), indent=1) + "\n")
    rows = [*(f"AP/{name}" for name in DETECTION_CLASSES), "small", *ANY_FIGURES, "mAP", "NDS", *BINS]
    tables = baselines | {name: [run[BOTH] for run in own] for name, own in scores.items()}
    return [
        "## Detection: by class and by distance\n",
        f"By distance: the share of objects with a box of their class within {MATCHED:g} m that scores {SURE:g} or "
        "more. `small` is the mean AP of bicycle, motorcycle, pedestrian and traffic cone; `any class` is average "
        f"precision whatever the class, up to {REACH:g} m from the ego. Baselines: the network untrained, and the "
        "boxes of the training split by heart.\n",
        markdown(_table(tables, rows)),
        "## Detection: what a lost sensor costs (mAP)\n",
        markdown([["input", *scores]] + [
            [name, *(spread([run[name]["mAP"] for run in own]) for own in scores.values())]
            for name in inputs(_cameras(validation))
        ]),
        "## Routing: verdicts\n",
        markdown(verdicts(scores)),
    ]  # fmt: skip


def verdicts(scores: dict[str, list[dict[str, dict[str, float]]]]) -> list[list[str]]:
    """Whether each routed configuration is better than the one without, and whether small objects do not collapse
    (−10 % of their AP). A difference counts from twice its standard error on; below `SEEDS` runs nothing is said."""
    rows = [["claim", "with", "without", "verdict"]]
    plain = next((name for name in scores if not name.startswith("cmt_aqr")), None)
    for name, own in scores.items() if plain else ():
        for claim, figure, kept in (("mAP is higher", "mAP", 1.0), ("small objects do not collapse", "small", 0.9)):
            now, before = ([run[BOTH][figure] for run in runs] for runs in (own, scores[plain]))
            if name != plain:
                verdict = exceeds(now, [kept * value for value in before])
                rows.append([f"{name}: {claim}", spread(now), spread(before), verdict])
    return rows


def exceeds(now: Sequence[float], limit: Sequence[float]) -> str:
    """Whether the mean of some runs is above that of others by more than twice the standard error of the difference."""
    if min(len(now), len(limit)) < SEEDS:
        return f"{UNSURE}: {min(len(now), len(limit))} of {SEEDS} seeds"
    now, limit = (torch.tensor(values, dtype=torch.float64) for values in (now, limit))
    noise = 2 * float((now.var() / len(now) + limit.var() / len(limit)).sqrt())
    difference = float(now.mean() - limit.mean())
    return HOLDS if difference > noise else FAILS if difference < -noise else UNSURE


def _evaluate_run(run, validation, options):
    """Input → figures of a run's best checkpoint."""
    settings, model = run.settings, run.saved.build_model(options.device)
    options.progress(f"{run.folder.name}: detecting")
    found = detect(model, settings, validation, inputs(_cameras(validation)))
    options.progress(f"{run.folder.name}: scoring")
    return {name: _score(own, settings, validation) for name, own in found.items()}


def _cameras(samples):
    return samples.moment(0).rig.names


def inputs(cameras: Sequence[str]) -> dict[str, Callable[[DetectionBatch], DetectionBatch]]:
    """What a run is evaluated with: name → what it does to a batch."""
    return INPUTS | {f"no {camera}": partial(_without, index=index) for index, camera in enumerate(cameras)}


def _without(batch: DetectionBatch, index: int) -> DetectionBatch:
    images = batch.images.clone()
    images[:, index] = 0
    return replace(batch, images=images)


@torch.no_grad()
def detect(
    model,
    settings: DetectionExperiment,
    samples: DetectionSamples,
    changes: dict[str, Callable[[DetectionBatch], DetectionBatch]] | None = None,
) -> dict[str, Found]:
    """What a detector says of every sample of a set, for each change that is made to its batches (None: as it is)."""
    model.eval()
    changes = changes or {BOTH: INPUTS[BOTH]}
    device, found = next(model.parameters()).device, {name: {} for name in changes}
    for index in range(len(samples)):
        item = settings.collate([samples[0, index]])
        whole = item.to(device)
        bev, views = model.bev_map(whole.points), model.camera_maps(whole.images)
        for name, change in changes.items():
            changed = change(item)
            batch = changed.to(device)
            # a sensor that stays as it is has the same map
            own_bev = bev if changed.points is item.points else model.bev_map(batch.points)
            own_views = views if changed.images is item.images else model.camera_maps(batch.images)
            output = model.decide(own_bev, own_views, batch)
            found[name] |= zip(batch.tokens, in_ego(decode(output.predictions), batch))
    return found


def _untrained(settings: DetectionExperiment):
    torch.manual_seed(settings.run.seed)
    return settings.build_model()


def by_heart(training: DetectionSamples, validation: DetectionSamples) -> Found:
    """The places where training has objects most often, said of every sample: the best that looks at nothing."""
    cells = defaultdict(list)
    for place in range(len(training.places)):
        for box, label in zip(*_truth(training, place)):
            cells[(int(label), *(box[:2] / _CELL).floor().int().tolist())].append(box)
    best = sorted(cells.items(), key=lambda cell: (-len(cell[1]), cell[0]))[:300]
    if not best:
        return {}
    boxes = torch.stack([own[len(own) // 2].nan_to_num() for _, own in best])
    scores = torch.tensor([len(own) / len(training.places) for _, own in best]).clamp(max=1)
    found = Detections(boxes, scores, torch.tensor([key[0] for key, _ in best]))
    return {validation.moment(place).token: found for place in range(len(validation.places))}


def _truth(samples, place) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Boxes and labels of a sample in the reference ego frame."""
    moment = samples.moment(place)
    boxes, labels = samples.targets(moment)
    return move_boxes(boxes, samples.ego_T_frame(moment)), labels


def _score(found, settings, validation):
    """The official figures, the mean AP of small objects, that of boxes whatever their class, and the share found by
    distance. Objects beyond the range that the network sees are missed."""
    validation = DetectionSamples(validation.drives, replace(settings.data, point_range=_EVERYWHERE), False)
    figures = evaluate_detection(found, settings.data.root, settings.data.version, split_names(settings.data)[1])
    figures["small"] = sum(figures[f"AP/{name}"] for name in SMALL) / len(SMALL)
    figures |= any_class(found, validation)
    hits, objects = torch.zeros(len(BINS)), torch.zeros(len(BINS))
    for place in range(len(validation.places)):
        boxes, labels = _truth(validation, place)
        said = found.get(validation.moment(place).token)
        where = torch.bucketize(boxes[:, :2].norm(dim=1), torch.tensor(DISTANCES[1:], dtype=boxes.dtype), right=True)
        hit = torch.zeros(len(boxes))
        if said is not None:
            sure = said.scores >= SURE
            near = torch.cdist(boxes[:, :2], said.boxes[sure][:, :2].cpu()) < MATCHED
            hit = (near & (labels[:, None] == said.labels[sure].cpu())).any(1).float()
        hits, objects = hits.index_add(0, where, hit), objects.index_add(0, where, torch.ones(len(boxes)))
    figures |= {name: float(h / n) if n else math.nan for name, h, n in zip(BINS, hits, objects)}
    return figures


def any_class(found: Found, samples: DetectionSamples) -> dict[str, float]:
    """Average precision of boxes whatever their class, see `AnyClassMetric`."""
    metric = AnyClassMetric(REACH)
    for place in range(len(samples.places)):
        token, true = samples.moment(place).token, _truth(samples, place)[0]
        said = found.get(token)
        if said is None:
            metric.add(token, torch.empty(0, 2), torch.empty(0), true)
        else:
            metric.add(token, said.boxes, said.scores, true)
    return metric.compute()


def _table(columns, names):
    return [["figure", *columns]] + [
        [name, *(spread([figures[name] for figures in own]) for own in columns.values())] for name in names
    ]
