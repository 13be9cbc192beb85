"""Detections: decoded, suppressed, evaluated, shown."""
