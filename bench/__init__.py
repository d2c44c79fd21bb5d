"""Benchmarks: every op against its peers, against fp64, and against the hardware's floor, in one process.

    run.py              the command line: what to run, in which order, within which time
    core.py             what an op, a provider, a problem and a case are
    method.py           how a call is timed and its memory measured
    runner.py           check, measure, time: a case becomes rows
    record.py           a row, its CSV file, and the versions in it
    report.py plots.py  tables and pictures of rows
    compare.py          what changed between two CSV files beyond their noise
    linear_logprob.py   log-probs and losses from hidden states; head.py has their inputs and fp64 oracle,
                        peers.py the adapters to other libraries
    gae.py  ppo_loss.py  log_ratio.py  training_step.py     the other ops
    memory.py           peak memory of whole training runs, each a process of its own (memory_run.py)
    test_bench.py       the same ops through pytest-benchmark

Nothing here claims an absolute speed: the figure that counts is the ratio to bare GEMMs (or to a bare copy of the bytes
that must move), timed in turns with the provider in the same process.
"""
