"""A long run of mixed and hostile traffic: does everything come back to where it was?"""
