"""What does the CUDA path cost and give on one GPU: waking up, PARTIME's nets, transfers, streams that share a GPU?"""
