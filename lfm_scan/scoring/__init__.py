"""Bytes in, results out, without Ray.

Nothing is imported here: `prepare` and `result` run in decoding workers, which should not load torch; `backend`,
`weights` and `scorer` do load it.
"""
