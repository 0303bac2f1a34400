"""The proof that every reader of an exported model gets the same ids and logits as training.

`prompt_readers.py` is imported in the converter's environment (transformers 4, numpy 1). It and its imports must not need
transformers 5 or mmengine's runner.
"""
