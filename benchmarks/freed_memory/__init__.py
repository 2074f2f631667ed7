"""What does it cost to give the memory of each activation back to the system?"""
