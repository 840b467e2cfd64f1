"""Which batches are repeated on purpose or belong to no labels, and what many ranks cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness import StepGuard
from harness.config import GuardConfig
from harness.records import Finding
from harness.stability.audits.forward import ForwardWatch
from harness.stability.checks.all import Checks
from harness.stability.checks.batches import MAX_RANKS, BatchHistory, RankBatches, sharing_ranks
from harness.stability.checks.inputs import _of_generators
from tests.support.silent_errors import adamw, found_in, network, points, square


def periods_of(batches: list[int]) -> set[int]:
    """All that is found in looks of eleven batches each."""
    history = BatchHistory()
    looks = [batches[place : place + 11] for place in range(0, len(batches), 11)]
    return {period for look in looks for period in history.periods([RankBatches(look, [])]).values()}


def blocks(num: int, size: int, times: int) -> list[int]:
    """`num` blocks of new batches, each block repeated so many times and then dropped."""
    return [1 + block * size + i for block in range(num) for _ in range(times) for i in range(size)]


def test_what_is_repeated_a_few_times_and_dropped_is_repeated_on_purpose() -> None:
    for size, times in ((1, 4), (8, 2), (4, 4), (1, 2), (16, 10)):
        assert periods_of(blocks(20, size, times)) == set(), (size, times)
    assert periods_of(blocks(1, 3, 100)) == set()  # three batches, to be overfitted


def test_epochs_in_one_order_are_named_and_others_are_not() -> None:
    assert periods_of(blocks(1, 40, 3)) == {40}
    shuffled = [1 + int(i) for seed in range(4) for i in torch.randperm(40, generator=_seeded(seed))]
    assert periods_of(shuffled) == set()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counted(int):
    """Counts how often one is compared with another."""

    num = 0

    def __eq__(self, other: object) -> bool:
        Counted.num += 1
        return int.__eq__(self, other) is True

    __hash__ = int.__hash__


def test_comparing_batches_and_generators_of_many_ranks_takes_no_square_of_their_number() -> None:
    num_ranks = 2000
    ranks = [
        RankBatches([Counted(100 * rank + step) for step in range(1, 7)], []) for rank in range(num_ranks)
    ]
    Counted.num = 0
    assert sharing_ranks(ranks) == []
    assert list(_of_generators([(1, Counted(rank)) for rank in range(num_ranks)])) == []
    assert Counted.num < 20 * num_ranks


def test_what_is_remembered_does_not_grow_with_the_number_of_ranks() -> None:
    history = BatchHistory()
    history.periods([RankBatches([1, 2, 3], [])] * 1000)
    assert len(history._of_rank) == MAX_RANKS


def test_two_kinds_of_problem_of_one_check_are_both_said() -> None:
    checks = Checks(GuardConfig())
    one = Finding(check="repeated batch", problem="after 40 steps", remedy="shuffle")
    other = Finding(check="repeated batch", problem="several in a row", remedy="split")
    assert checks._unsaid([one], 9) == [one]
    assert checks._unsaid([one, other], 20) == [other]


def disagreeing(*batches: dict[str, Tensor]) -> tuple[int, int] | None:
    watch = ForwardWatch()
    model = nn.Identity()
    for batch in batches:
        watch._note(model, (), batch)
    return watch.lengths


def test_labels_of_a_graph_and_targets_of_ctc_are_not_counted_by_samples() -> None:
    nodes, ids = torch.zeros(40, 3), torch.zeros(6, 5, dtype=torch.int64)
    labels, wrong = torch.zeros(6, 5), torch.zeros(5, 5)
    assert disagreeing({"x": nodes, "y": torch.zeros(40)}, {"x": nodes, "y": torch.zeros(8)}) is None
    assert disagreeing(*[{"inputs": nodes, "targets": torch.zeros(170)}] * 3) is None
    assert disagreeing(*[{"input_ids": ids, "labels": torch.zeros(3)}] * 3) is None  # pairs of sentences
    assert disagreeing({"input_ids": ids, "labels": labels}, {"input_ids": ids, "labels": wrong}) == (6, 5)


def test_rollouts_of_a_policy_with_dropout_are_no_evaluation() -> None:
    model = network(act=nn.Dropout(0.1))

    def step(number: int, guard: StepGuard) -> Tensor:
        if number % 8 == 0:
            with torch.no_grad():
                for place in range(4):
                    model(points(1000 + number + place))
        return square(model, points(number))

    assert found_in(model, adamw(model), step=step, num_steps=50) == []
