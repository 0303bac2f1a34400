"""Export to Hugging Face and TurboMind folders, and the demo's base models.

`turbomind_convert.py` is imported in the converter's environment (transformers 4, numpy 1). It and its imports
must not need transformers 5 or mmengine's runner.
"""
