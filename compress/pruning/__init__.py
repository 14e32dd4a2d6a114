"""Visual-token pruning: which image tokens a multimodal model's language model gets to see.

with compress.prune_visual_tokens(model, strategy) as pruning:
    model.generate(**inputs)
"""
