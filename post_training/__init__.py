"""Library shared by the stages: see design notes in each module. It never imports a stage."""
