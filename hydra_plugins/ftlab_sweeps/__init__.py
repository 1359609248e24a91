"""What Hydra finds here: a launcher that gives every job a process, sweepers that know what a killed sweep has done.

Hydra imports every module of this package at its start, so none of them imports anything heavy at its top.
"""
