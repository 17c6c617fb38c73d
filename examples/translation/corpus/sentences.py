"""English-German pairs for machines without a network, written for this example.

They are enough to run everything, and too few to learn from.
"""

from __future__ import annotations

PAIRS = (
    ("Good morning, how are you?", "Guten Morgen, wie geht es dir?"),
    ("The train leaves at eight.", "Der Zug fährt um acht ab."),
    ("I would like a cup of tea.", "Ich hätte gern eine Tasse Tee."),
    ("My sister lives in a small town.", "Meine Schwester wohnt in einer kleinen Stadt."),
    ("Where is the next bus stop?", "Wo ist die nächste Bushaltestelle?"),
    ("It is raining again today.", "Heute regnet es schon wieder."),
    ("Please close the window.", "Bitte mach das Fenster zu."),
    ("We are going to the market.", "Wir gehen auf den Markt."),
    ("The book is on the table.", "Das Buch liegt auf dem Tisch."),
    ("She reads a book every week.", "Sie liest jede Woche ein Buch."),
    ("The children are playing in the garden.", "Die Kinder spielen im Garten."),
    ("Can you help me, please?", "Kannst du mir bitte helfen?"),
    ("I do not understand the question.", "Ich verstehe die Frage nicht."),
    ("The shop is closed on Sunday.", "Der Laden ist am Sonntag geschlossen."),
    ("He has two brothers and a sister.", "Er hat zwei Brüder und eine Schwester."),
    ("The soup is too hot.", "Die Suppe ist zu heiß."),
    ("We need bread and milk.", "Wir brauchen Brot und Milch."),
    ("The dog sleeps under the table.", "Der Hund schläft unter dem Tisch."),
    ("Tomorrow I have to work.", "Morgen muss ich arbeiten."),
    ("The door is open.", "Die Tür ist offen."),
    ("How much is the ticket?", "Wie viel kostet die Fahrkarte?"),
    ("My father is cooking dinner.", "Mein Vater kocht das Abendessen."),
    ("The river is very cold.", "Der Fluss ist sehr kalt."),
    ("See you tomorrow morning.", "Bis morgen früh."),
    ("I forgot my umbrella at home.", "Ich habe meinen Regenschirm zu Hause vergessen."),
    ("The lamp in the kitchen is broken.", "Die Lampe in der Küche ist kaputt."),
)
