"""Does a pipeline that learns while it predicts keep the accuracy of back-propagation, and at what price?"""
