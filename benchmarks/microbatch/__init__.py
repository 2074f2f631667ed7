"""What does it gain to run frames that wait as one batch, and what does it cost in latency?"""
