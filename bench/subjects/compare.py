"""The comparison of V1 with V2: topology × implementation, on the attention alone, on stage 1, and on a training step
of the whole cascade."""

from dataclasses import dataclass

import torch

from ...train.claims import RUN_MEMORY, RUN_SPEED, STAGE_MEMORY, STAGE_SPEED
from ...train.command_line import TextTable, UsageError
from .. import claims
from ..geometry import GEOMETRY, rig_of
from ..implementations import EAGER, REFERENCE, SDPA, TOOLKIT
from ..results import Table
from ..stage import CAMERAS, Case, attention_call, attention_floor, block_table, make_problem, temporal_call
from ..subject import Place, Plan, Subject, chosen
from ..workload import MODE_NAMES, MODES, STEP, Unavailable, Workload

SCOPES = dict(
    attention="the attention alone: queries, keys and values in, attended values out",
    temporal="stage 1: warp, attention, decode, fuse",
    step="one training step of the whole cascade; memory above the weights, the optimiser's state and the images",
)


@dataclass(frozen=True)
class Provider:
    topology: str
    implementation: str
    about: str


PROVIDERS = {
    "v1": Provider("global", EAGER, "the documents' V1 in plain eager PyTorch, all 6 cameras, everything stored"),
    "v2": Provider("neighbours", TOOLKIT, "V2 on this toolkit's operations, 3 cameras"),
    "v1-sdpa": Provider("global", SDPA, "V1 as one writes it today: scaled_dot_product_attention on gathered keys"),
    "v2-sdpa": Provider("neighbours", SDPA, "V2 as one writes it today"),
    "v1-fused": Provider("global", TOOLKIT, "V1 on this toolkit's operations"),
    "v2-eager": Provider("neighbours", EAGER, "V2 in plain eager PyTorch"),
    "v3": Provider(
        GEOMETRY, TOOLKIT, "V3 on this toolkit's operations: geometry first, another function than V1 and V2"
    ),
    "v3-eager": Provider(GEOMETRY, EAGER, "V3 in plain eager PyTorch"),
}
GROUPS = {name: provider.topology for name, provider in PROVIDERS.items()}
PLAIN = {"global": "v1", "neighbours": "v2-eager", GEOMETRY: "v3-eager"}

_UPSTREAM = (256, 704)
CASES = {
    case.name: case
    for case in (
        Case("documents", "1/32 of 900×1600, as the documents have it", quick=True),
        Case("documents-two-missing", "two cameras missing", missing=(0, 3), quick=True, heavy=True),
        Case("documents-t2", "two moments of history", moments=2, heavy=True),
        Case("documents-t3", "three moments of history", moments=3, default=False),
        Case("documents-t4", "four moments of history", moments=4),
        Case("documents-b2", "batch of 2", batch=2, heavy=True),
        Case("documents-b4", "batch of 4", batch=4, heavy=True),
        Case("documents-b8", "batch of 8", batch=8, heavy=True),
        Case("upstream", "1/32 of upstream's 256×704", image=_UPSTREAM, quick=True, experiment="completion_v2_256x704"),
        Case("upstream-fine", "1/8 of upstream's 256×704", image=_UPSTREAM, stride=8, heavy=True, experiment=""),
        Case("upstream-half", "1/32 of 128×352", image=(128, 352), default=False, experiment="completion_v2_256x704"),
        Case("fine", "1/8 of 900×1600: plain PyTorch needs tens of GB", stride=8, heavy=True, experiment=""),
        Case("tiny", "to try the command", (128, 192), 32, 32, 2, default=False, experiment="completion_v2_tiny"),
    )
}
# Of the scope `step`. At the documents' size plain PyTorch needs tens of GB.
_QUICK_STEPS, _CPU_STEPS, _GPU_STEPS = ("tiny",), ("upstream-half",), ("documents", "documents-t4", "upstream")
_STEP_WORK = 250.0  # of one moment's images at 256×704, in the unit of `Case.work`


def default_cases(scope: str, quick: bool, device: torch.device) -> list[str]:
    """What is measured in a scope where no case is named."""
    on_gpu = device.type == "cuda"
    if scope == "step":
        return list(_QUICK_STEPS if quick else _GPU_STEPS if on_gpu else _CPU_STEPS)
    if quick:
        return [case.name for case in CASES.values() if case.quick]
    return [case.name for case in CASES.values() if case.default and (on_gpu or not case.heavy)]


def suits(scope: str, case: Case, device: torch.device) -> bool:
    """Whether a case that was named is measured in a scope that was not."""
    small = device.type == "cuda" or case.name in (*_QUICK_STEPS, *_CPU_STEPS)
    return scope != "step" or (bool(case.experiment) and small)


class Compare(Subject):
    option = "compare"
    about = "compare these; the first is the baseline"
    settings = dict(nargs="+", metavar="PROVIDER")
    any_rig = True

    def add_options(self, add):
        add("--scope", nargs="+", metavar="SCOPE", help="default: all of them")

    def plan(self, arguments, device):
        providers = chosen("provider", arguments.compare, PROVIDERS)
        if arguments.check_claims and not {"v1", "v2"} <= set(providers):
            raise UsageError("--check-claims needs --compare v1 v2")
        scopes = [name for name in SCOPES if name in chosen("scope", arguments.scope, SCOPES)]
        cases = {scope: default_cases(scope, arguments.quick, device) for scope in scopes}
        if arguments.case:
            given, named = chosen("case", arguments.case, CASES), arguments.scope or ()
            cases = {scope: [c for c in given if scope in named or suits(scope, CASES[c], device)] for scope in scopes}
        places = [Place(scope, case) for scope in scopes for case in cases[scope]]
        order = list(dict.fromkeys(arguments.case or CASES))  # the places of a case together
        return Plan(self.option, tuple(sorted(places, key=lambda place: order.index(place.case))), tuple(providers))

    def work(self, place):
        case = CASES[place.case]
        if place.scope != "step":
            return case.work * (1.0 if place.scope == "temporal" else 0.5)
        return _STEP_WORK * case.batch * (1 + case.moments) * case.image[0] * case.image[1] / (256 * 704)

    def make_workload(self, place, request):
        return make_workload(place.scope, CASES[place.case], request.plan.providers, request.device, request.drives)

    def judge(self, request, outcome):
        """The claims, at the documents' size where it was run, else at the first case."""
        if not {"v1", "v2"} <= set(request.plan.providers):
            return []
        cameras = len(rig_of(request.drives).cameras)
        return judge(outcome, request.plan.cases, request.modes, torch.finfo(request.dtype).eps, cameras)

    def pictures(self, request, folder):
        from .. import plots

        return plots.draw_geometry(request.drives, folder)

    def listing(self):
        cases = []
        for case in CASES.values():
            height, width = case.size
            numbers = [f"{height}×{width}", str(case.moments), str(case.batch), "yes" if case.quick else ""]
            cases.append([case.name, case.about, *numbers])
        providers = [[name, provider.about] for name, provider in PROVIDERS.items()]
        return [
            TextTable("--compare PROVIDER …", ["provider", "what it is"], 2, providers),
            TextTable("--scope SCOPE …", ["scope", "what is measured"], 2, [list(scope) for scope in SCOPES.items()]),
            TextTable("--case CASE …", ["case", "what it is", "cells", "T", "B", "--quick"], 2, cases),
        ]


SUBJECT = Compare()


def judge(outcome, cases, modes, epsilon, cameras=CAMERAS) -> list[claims.Judged]:
    """The documents' claims about V2 against V1. epsilon: of the run's dtype. cameras: of the rig; that half of the
    keys are read is claimed of six."""
    table, case = Table(outcome.rows), claims.claimed_case(cases)
    judged = [claims.judge_keys(outcome, cases)] if cameras == CAMERAS else []
    for mode in (mode for mode in modes if mode in MODES):
        where = claims.Where("temporal", case, mode, f"stage 1, {MODE_NAMES[mode]}")
        judged += [claims.judge_memory(STAGE_MEMORY, table, where), claims.judge_speed(STAGE_SPEED, table, where)]
    steps = [case for scope, case in outcome.sizes if scope == "step"]
    if steps:
        where = claims.Where("step", claims.claimed_case(steps), STEP, "a whole training step")
        judged += [claims.judge_memory(RUN_MEMORY, table, where), claims.judge_speed(RUN_SPEED, table, where)]
    return [*judged, claims.judge_equality(outcome, epsilon)]


def make_workload(scope, case: Case, timed: tuple[str, ...], device: torch.device, drives) -> Workload:
    if scope == "step":
        return _step_workload(case, timed, device, drives)
    groups, plain = GROUPS, PLAIN
    if scope == "attention":  # V3's comes after its geometry, and has other keys
        plain = {topology: name for topology, name in PLAIN.items() if topology != GEOMETRY}
        groups = {name: topology for name, topology in GROUPS.items() if topology in plain}
        timed = tuple(name for name in timed if name in groups)
        if not timed:
            raise Unavailable("V3 has no attention that could stand beside V1's and V2's")
    problem = make_problem(case, device, drives)
    make = attention_call if scope == "attention" else temporal_call
    tables = {topology: block_table(problem, topology) for topology in PLAIN if topology != GEOMETRY}
    listed = {topology: int((table >= 0).sum()) // len(table) for topology, table in tables.items()}
    return Workload(
        subject=SUBJECT.option,
        scope=scope,
        case=case.name,
        groups=groups,
        plain=plain,
        timed=timed,
        build=lambda name, dtype: make(problem, PROVIDERS[name].implementation, PROVIDERS[name].topology, dtype),
        build_reference=lambda group: make(problem, REFERENCE, group, torch.float64),
        floor=(lambda name, dtype: attention_floor(problem, GROUPS[name], dtype)) if scope == "attention" else None,
        sizes=case.sizes,
        keys={name: listed[topology] * case.cells for name, topology in GROUPS.items() if topology in listed},
    )


def _step_workload(case, timed, device, drives) -> Workload:
    from ..step import make_step, step_call

    step = make_step(case, device, drives)
    return Workload(
        subject=SUBJECT.option,
        scope="step",
        case=case.name,
        groups=GROUPS,
        plain=PLAIN,
        timed=timed,
        build=lambda name, dtype: step_call(step, PROVIDERS[name].implementation, PROVIDERS[name].topology, dtype),
        build_reference=lambda group: step_call(step, REFERENCE, group, torch.float64),
        sizes=case.sizes,
        modes=(STEP,),
    )
