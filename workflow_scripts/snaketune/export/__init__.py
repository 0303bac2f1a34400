"""Hugging Face and TurboMind folders: how models leave training, and the demo's base models.

`turbomind.py` is imported in the converter's environment (transformers 4, numpy 1): it and what it imports
here must not need transformers 5 or mmengine's runner.
"""
