"""What every operation needs, written once: argument tables and checks, backend choice, registration and gradients,
launches and their plans, the shared parts of attention, and profiler ranges."""
