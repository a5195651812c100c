"""One operation against its peers: eager PyTorch, torch.compile, and whatever else computes the same."""

from ...train.command_line import TextTable, UsageError, choose
from ..operation import PLAIN, SCOPE, TOOLKIT, make_workload
from ..operations import OPERATIONS
from ..subject import Place, Plan, Subject, chosen


class OneOperation(Subject):
    option = "op"
    about = "measure one operation against its peers"
    settings = dict(metavar="NAME")
    takes = Subject.takes - {"data"}

    def add_options(self, add):
        add("--peers", nargs="*", metavar="PEER", help=f"beside {PLAIN} and {TOOLKIT} (default: all; may be none)")

    def plan(self, arguments, device):
        if arguments.check_claims:
            raise UsageError("--check-claims needs --compare v1 v2 or --detector")
        operation = OPERATIONS[choose("operation", arguments.op, OPERATIONS)]
        peers = operation.all_peers
        if arguments.peers is not None:
            peers = [choose("peer", name, peers) for name in dict.fromkeys(arguments.peers)]
        cases = chosen("case", arguments.case or self._cases(operation, arguments.quick, device), operation.cases)
        return Plan(operation.name, tuple(Place(SCOPE, case) for case in cases), (PLAIN, TOOLKIT, *peers))

    @staticmethod
    def _cases(operation, quick, device):
        if quick:
            return list(operation.quick)
        left_out = {"tiny"} if device.type == "cuda" else {"tiny", *operation.heavy}
        return [case for case in operation.cases if case not in left_out]

    def make_workload(self, place, request):
        return make_workload(OPERATIONS[request.plan.name], place.case, request.device, request.plan.providers)

    def listing(self):
        rows = [[op.name, ", ".join(op.providers), ", ".join(op.cases)] for op in OPERATIONS.values()]
        return [TextTable("--op NAME", ["operation", "measured", "cases"], 3, rows)]


SUBJECT = OneOperation()
