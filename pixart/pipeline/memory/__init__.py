"""What a run keeps in memory, and when: found by the run's own code on tensors that have sizes and no numbers.

fakes.py makes such tensors, for devices that need not be here either; meter.py counts what is allocated; heap.py
says what glibc keeps of what a CPU frees; survey.py goes through the stages of a pass, and plan.py tells them.
"""
