"""The word lists of the drills: everyday business words, names, things, keys, and the label words of the demo tasks."""

CONSONANTS = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")

# The adapters' label words, in both cases: a LoRA cannot emit a word that the base never learnt to emit.
LABELS = (
    "Billing", "Shipping", "Account", "Technical", "Refund", "Other", "High", "Medium", "Low", "Angry", "Worried",
    "Neutral", "Happy", "billing", "shipping", "account", "technical", "refund", "other", "high", "medium", "low",
    "angry", "worried", "neutral", "happy", "allow", "spam", "harassment", "threat", "privacy", "Allow", "Spam",
    "Harassment", "Threat", "Privacy", "Category", "Priority", "Sentiment", "category", "priority", "sentiment",
    "S", "O", "A", "P", "BP", "HR", "temp", "Possible", "Consider", "Suggest", "Review", "Findings", "Not recorded",
)  # fmt: skip

NAMES = (
    "Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Henry", "Iris", "James", "Kate", "Liam", "Maria",
    "Nina", "Omar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Yusuf", "Zoe", "Lena", "Mark", "Olga",
)  # fmt: skip

THINGS = (
    "order", "invoice", "parcel", "ticket", "account", "card", "refund", "password", "app", "phone", "laptop", "lamp",
    "chair", "table", "jacket", "kettle", "printer", "tablet", "speaker", "watch", "camera", "desk", "bag", "book",
    "mug", "router", "monitor", "keyboard", "headset", "charger", "cable", "bike", "tent", "pan", "plan", "bill",
    "receipt", "label", "box", "number", "code", "address", "appointment", "note", "report", "patient", "visit",
)  # fmt: skip

KEYS = (
    "name", "city", "color", "size", "price", "date", "order", "code", "age", "drug", "dose", "pulse", "pressure",
    "weight", "temperature", "room", "team", "status", "topic", "plan", "total", "number", "product", "country",
    "street", "day", "time", "duration", "symptom", "BP", "HR", "temp", "item", "amount", "owner", "model",
)  # fmt: skip

WORDS = (
    "about", "after", "again", "agent", "answer", "apple", "april", "asked", "august", "back", "bank", "before",
    "best", "better", "black", "blue", "bread", "bridge", "broken", "brown", "button", "cash", "change", "charge",
    "cheap", "check", "chest", "city", "clean", "clear", "clinic", "clock", "close", "cloud", "coffee", "cold",
    "cough", "credit", "customer", "damaged", "dark", "data", "deal", "delay", "delivery", "desk", "doctor", "door",
    "double", "drive", "dry", "early", "email", "empty", "error", "evening", "exam", "fast", "fee", "fever", "field",
    "file", "first", "fixed", "flat", "floor", "flower", "follow", "free", "fresh", "friday", "friend", "garden",
    "glass", "gold", "good", "gray", "green", "group", "hand", "happy", "hard", "head", "headache", "heart", "heavy",
    "help", "home", "hotel", "house", "ice", "iron", "january", "july", "june", "kind", "knee", "lake", "large",
    "late", "leaf", "letter", "light", "line", "link", "locked", "login", "long", "lost", "lunch", "mail", "market",
    "meeting", "message", "middle", "mild", "milk", "missing", "monday", "money", "month", "morning", "mountain",
    "music", "new", "night", "noise", "north", "office", "old", "online", "open", "orange", "package", "page", "pain",
    "paper", "park", "payment", "people", "photo", "plane", "plant", "plate", "please", "pocket", "point", "post",
    "power", "price", "problem", "public", "purple", "question", "quick", "quiet", "rain", "red", "reply", "rest",
    "return", "right", "river", "road", "room", "round", "safe", "sale", "salt", "school", "screen", "season", "seat",
    "second", "service", "settings", "sharp", "shelf", "shop", "short", "side", "silver", "simple", "slow", "small",
    "smart", "smooth", "snow", "soft", "sore", "south", "spring", "square", "star", "station", "stone", "store",
    "store", "street", "strong", "sugar", "summer", "sunday", "sunny", "support", "system", "tablet", "tall", "tea",
    "team", "test", "thank", "throat", "thunder", "today", "tomorrow", "town", "train", "travel", "tree", "twice",
    "update", "urgent", "useful", "wait", "wall", "warm", "water", "website", "week", "west", "white", "wide",
    "window", "winter", "wood", "work", "wrong", "yellow", "yesterday", "young",
)  # fmt: skip
