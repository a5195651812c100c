"""What every operation needs: backend choice, argument checks, op registration, kernel configurations, NVTX ranges."""
