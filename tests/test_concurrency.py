from __future__ import annotations

from lfm_scan.concurrency import map_ahead


def test_no_more_is_begun_ahead_than_a_bound_that_may_change_allows() -> None:
    begun: list[int] = []
    bound = 2

    def begin(item: int) -> int:
        begun.append(item)
        return item

    results = map_ahead(begin, lambda item: item * 10, range(9), lambda: bound)

    assert next(results) == 0
    assert begun == [0, 1]
    bound = 4
    assert next(results) == 10
    assert begun == [0, 1, 2, 3, 4]
    bound = 1
    assert [next(results) for _ in range(3)] == [20, 30, 40]
    assert begun == [0, 1, 2, 3, 4]
    assert list(results) == [50, 60, 70, 80]
