"""What does a pipeline cost where cutting does not pay?"""
