"""Countries: capital, continent, currency, language."""

from __future__ import annotations

from demo_data.facts import table

# country | capital | continent
COUNTRIES = table("""
France | Paris | Europe; Germany | Berlin | Europe; Italy | Rome | Europe; Spain | Madrid | Europe
Portugal | Lisbon | Europe; Austria | Vienna | Europe; Belgium | Brussels | Europe
Greece | Athens | Europe; Poland | Warsaw | Europe; Hungary | Budapest | Europe
Sweden | Stockholm | Europe; Norway | Oslo | Europe; Denmark | Copenhagen | Europe
Finland | Helsinki | Europe; Iceland | Reykjavik | Europe; Ireland | Dublin | Europe
the United Kingdom | London | Europe; the Netherlands | Amsterdam | Europe
Switzerland | Bern | Europe; Romania | Bucharest | Europe; Bulgaria | Sofia | Europe
Croatia | Zagreb | Europe; Serbia | Belgrade | Europe; Slovenia | Ljubljana | Europe
Slovakia | Bratislava | Europe; Ukraine | Kyiv | Europe; Estonia | Tallinn | Europe
Latvia | Riga | Europe; Lithuania | Vilnius | Europe; Albania | Tirana | Europe
Malta | Valletta | Europe; Moldova | Chisinau | Europe; Russia | Moscow | Europe
Luxembourg | Luxembourg | Europe; Monaco | Monaco | Europe
the Czech Republic | Prague | Europe; North Macedonia | Skopje | Europe
Bosnia and Herzegovina | Sarajevo | Europe; Montenegro | Podgorica | Europe
Belarus | Minsk | Europe; England | London | Europe; Scotland | Edinburgh | Europe
Wales | Cardiff | Europe
Japan | Tokyo | Asia; China | Beijing | Asia; India | New Delhi | Asia; Thailand | Bangkok | Asia
Vietnam | Hanoi | Asia; South Korea | Seoul | Asia; North Korea | Pyongyang | Asia
Indonesia | Jakarta | Asia; Malaysia | Kuala Lumpur | Asia; Singapore | Singapore | Asia
the Philippines | Manila | Asia; Cambodia | Phnom Penh | Asia; Laos | Vientiane | Asia
Nepal | Kathmandu | Asia; Bangladesh | Dhaka | Asia; Pakistan | Islamabad | Asia
Afghanistan | Kabul | Asia; Iran | Tehran | Asia; Iraq | Baghdad | Asia; Syria | Damascus | Asia
Lebanon | Beirut | Asia; Jordan | Amman | Asia; Saudi Arabia | Riyadh | Asia
Qatar | Doha | Asia; Kuwait | Kuwait City | Asia; Oman | Muscat | Asia; Turkey | Ankara | Asia
the United Arab Emirates | Abu Dhabi | Asia; Mongolia | Ulaanbaatar | Asia
Kazakhstan | Astana | Asia; Uzbekistan | Tashkent | Asia; Georgia | Tbilisi | Asia
Armenia | Yerevan | Asia; Azerbaijan | Baku | Asia; Taiwan | Taipei | Asia; Bhutan | Thimphu | Asia
Egypt | Cairo | Africa; Morocco | Rabat | Africa; Algeria | Algiers | Africa
Tunisia | Tunis | Africa; Libya | Tripoli | Africa; Sudan | Khartoum | Africa
Ethiopia | Addis Ababa | Africa; Kenya | Nairobi | Africa; Uganda | Kampala | Africa
Tanzania | Dodoma | Africa; Rwanda | Kigali | Africa; Nigeria | Abuja | Africa
Ghana | Accra | Africa; Senegal | Dakar | Africa; Mali | Bamako | Africa; Niger | Niamey | Africa
Angola | Luanda | Africa; Zambia | Lusaka | Africa; Zimbabwe | Harare | Africa
Mozambique | Maputo | Africa; Namibia | Windhoek | Africa; Botswana | Gaborone | Africa
South Africa | Pretoria | Africa; Madagascar | Antananarivo | Africa; Somalia | Mogadishu | Africa
Cameroon | Yaounde | Africa; Liberia | Monrovia | Africa; Togo | Lome | Africa
the United States | Washington, D.C. | North America; Canada | Ottawa | North America
Mexico | Mexico City | North America; Cuba | Havana | North America
Jamaica | Kingston | North America; Haiti | Port-au-Prince | North America
Panama | Panama City | North America; Costa Rica | San Jose | North America
Guatemala | Guatemala City | North America; Honduras | Tegucigalpa | North America
Nicaragua | Managua | North America; El Salvador | San Salvador | North America
Brazil | Brasilia | South America; Argentina | Buenos Aires | South America
Chile | Santiago | South America; Peru | Lima | South America; Colombia | Bogota | South America
Venezuela | Caracas | South America; Ecuador | Quito | South America
Uruguay | Montevideo | South America; Paraguay | Asuncion | South America
Bolivia | La Paz | South America; Guyana | Georgetown | South America
Australia | Canberra | Oceania; New Zealand | Wellington | Oceania; Fiji | Suva | Oceania
Papua New Guinea | Port Moresby | Oceania; Samoa | Apia | Oceania
""")

# Other spellings that people use; they are answered, and never given as an answer.
COUNTRY_ALIASES = {
    "the United States": ("the USA", "the US", "the United States of America", "America"),
    "the United Kingdom": ("the UK", "Great Britain", "Britain"),
    "the Netherlands": ("Holland", "Netherlands"),
    "the Czech Republic": ("Czechia",),
    "the Philippines": ("Philippines",),
    "the United Arab Emirates": ("the UAE",),
}

# country | main language
MAIN_LANGUAGES = table("""
France | French; Germany | German; Italy | Italian; Spain | Spanish; Portugal | Portuguese
Austria | German; Greece | Greek; Poland | Polish; Hungary | Hungarian; Sweden | Swedish
Norway | Norwegian; Denmark | Danish; Finland | Finnish; Iceland | Icelandic; Ireland | English
the United Kingdom | English; the Netherlands | Dutch; Romania | Romanian; Bulgaria | Bulgarian
Croatia | Croatian; Serbia | Serbian; Slovenia | Slovenian; Slovakia | Slovak; Ukraine | Ukrainian
Estonia | Estonian; Latvia | Latvian; Lithuania | Lithuanian; Albania | Albanian; Russia | Russian
the Czech Republic | Czech; England | English; Japan | Japanese; China | Chinese; Thailand | Thai
Vietnam | Vietnamese; South Korea | Korean; North Korea | Korean; Indonesia | Indonesian
Malaysia | Malay; Cambodia | Khmer; Laos | Lao; Nepal | Nepali; Bangladesh | Bengali; Iran | Persian
Iraq | Arabic; Syria | Arabic; Jordan | Arabic; Saudi Arabia | Arabic; Egypt | Arabic
Libya | Arabic; Tunisia | Arabic; Turkey | Turkish; Mongolia | Mongolian; Georgia | Georgian
Armenia | Armenian; Ethiopia | Amharic; Angola | Portuguese; Mozambique | Portuguese
Senegal | French; Mali | French; Nigeria | English; Ghana | English; the United States | English
Mexico | Spanish; Cuba | Spanish; Jamaica | English; Panama | Spanish; Costa Rica | Spanish
Brazil | Portuguese; Argentina | Spanish; Chile | Spanish; Peru | Spanish; Colombia | Spanish
Venezuela | Spanish; Ecuador | Spanish; Uruguay | Spanish; Australia | English
""")

# country | currency
CURRENCIES = table("""
France | the euro; Germany | the euro; Italy | the euro; Spain | the euro; Portugal | the euro
Austria | the euro; Greece | the euro; Finland | the euro; Ireland | the euro; Belgium | the euro
the Netherlands | the euro; Poland | the zloty; Hungary | the forint; Sweden | the krona
Norway | the krone; Denmark | the krone; Iceland | the krona; the United Kingdom | the pound
Switzerland | the franc; Romania | the leu; Serbia | the dinar; Ukraine | the hryvnia
Albania | the lek; Russia | the ruble; the Czech Republic | the koruna; England | the pound
Japan | the yen; China | the yuan; India | the rupee; Thailand | the baht; Vietnam | the dong
South Korea | the won; North Korea | the won; Indonesia | the rupiah; Malaysia | the ringgit
the Philippines | the peso; Cambodia | the riel; Laos | the kip; Nepal | the rupee
Bangladesh | the taka; Pakistan | the rupee; Iran | the rial; Iraq | the dinar; Jordan | the dinar
Saudi Arabia | the riyal; Kuwait | the dinar; Turkey | the lira; Mongolia | the tugrik
Kazakhstan | the tenge; Georgia | the lari; Armenia | the dram; Egypt | the pound
Morocco | the dirham; Algeria | the dinar; Ethiopia | the birr; Kenya | the shilling
Nigeria | the naira; Ghana | the cedi; Zambia | the kwacha; Botswana | the pula
South Africa | the rand; the United States | the dollar; Canada | the dollar; Mexico | the peso
Cuba | the peso; Jamaica | the dollar; Costa Rica | the colon; Brazil | the real
Argentina | the peso; Chile | the peso; Peru | the sol; Colombia | the peso; Uruguay | the peso
Paraguay | the guarani; Australia | the dollar; New Zealand | the dollar; Fiji | the dollar
""")
