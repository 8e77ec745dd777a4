"""How it is measured: clocks, memory, machines, results."""
