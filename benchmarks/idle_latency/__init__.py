"""How much later does one frame's result come when it passes an idle pipeline instead of a plain call?"""
