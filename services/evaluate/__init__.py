"""What a codec does to a model's output, measured: divergence, perplexity, recall, and cache upon cache.

All in float32: in bfloat16 the arithmetic alone moves the output by more than a good codec does.
"""
