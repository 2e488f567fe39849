"""Commands that a user types, as `python -m tools.NAME`. Each takes --help.

    demo       train a few rewards on the tiny world and compare them
    sweep      run a grid of settings, several seeds each, and compare the arms
    compare    compare two evals on the same problems: intervals, tests, transitions
    plot       draw the metrics of runs that you name
    figures    draw the figures of the papers from your runs
    clip_bias  measure the bias of the clip on a table of logits
    merge      write a run's base model with its adapter merged in
    export     write completions as a sample log of lm-evaluation-harness
    rewards    list the rewards, or score saved completions with them
    bench      time the phases of a step, alone or against transformers and TRL
    noise      measure how far rounding alone moves a model's ratios
    kill_runs     kill runs at random moments and compare them with an uninterrupted one
    fuzz_parsers  give random input to every parser
    fuzz_grader   measure how long a hostile answer can hold the trainer
    memory_table  compute the memory of each recipe, for cards of 8 to 24 GB

gpu_day.sh checks an installation on a GPU.

tools/parts holds what the commands are made of.
"""

import harness  # noqa: F401  (before torch: see harness/__init__.py)
