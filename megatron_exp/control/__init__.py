"""Closed loops: rules that decide while training how much is inserted next, and the segments that record what they decided.

    probe values -> rule -> state -> hand-out -> segment          (`rules`, `loop`, `hand_out`, `segments`)

Everything here is a pure function of the manifest and of recorded probe values, so a run's decisions can be made again offline.
"""
