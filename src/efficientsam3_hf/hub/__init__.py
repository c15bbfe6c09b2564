"""Between a folder and the Hugging Face Hub: cards, records, licences, what trainers push."""
