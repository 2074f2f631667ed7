"""Does memory stay flat over a million frames when the consumer is slow?"""
