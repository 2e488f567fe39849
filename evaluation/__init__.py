"""What evals are made of: statistics, metrics, comparisons, prompt tables and audits.

Functions only. The commands are eval.py and those in tools/.
"""
