"""A thousand requests at once on one pipeline: does each get its own answer, and what does that cost over a stream?"""
