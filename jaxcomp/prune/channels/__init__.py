"""Remove whole channels, for real: from evidence to scores, selection and a smaller model."""
