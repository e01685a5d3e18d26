"""Write the model card and the report from the record alone."""
