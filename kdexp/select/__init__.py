"""What a study comes to: the selection rule, the look at test, fresh seeds, files to deploy,
reproduction.
"""
