"""Networks whose path depends on the instance: what do many instances in flight gain, and what does each epoch lose?"""
