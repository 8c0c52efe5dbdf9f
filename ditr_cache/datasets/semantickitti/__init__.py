"""SemanticKITTI."""
