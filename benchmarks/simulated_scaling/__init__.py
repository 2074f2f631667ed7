"""Does the schedule itself scale: N simulated devices, N times the frames per virtual second?"""
