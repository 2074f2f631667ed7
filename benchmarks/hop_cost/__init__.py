"""What does it cost to hand a frame from stage to stage?"""
