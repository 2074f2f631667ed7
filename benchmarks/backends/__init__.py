"""Which way of running a compiled stage leaves the other thread alone, and how fast is it?"""
