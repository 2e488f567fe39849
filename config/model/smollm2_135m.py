"""SmolLM2-135M-Instruct on a laptop: a Llama by architecture, in 4 GB of memory on the CPU.

It solves almost no problem. It is here for its habits (docs/STUDY.md), and as a second family.
"""

base = "qwen2.5_coder_0.5b.py"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
