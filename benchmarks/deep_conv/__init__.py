"""How much faster is a deep convolutional net at batch 1 when its halves work on different frames?"""
